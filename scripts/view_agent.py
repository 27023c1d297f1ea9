"""The command `view-agent`, run from a checkout."""

from agent.commands.view_agent import main

if __name__ == "__main__":
    main()
