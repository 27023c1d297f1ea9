"""The command `evaluate-agent`, run from a checkout."""

from agent.commands.evaluate_agent import main

if __name__ == "__main__":
    main()
