"""The command `probe-memory`, run from a checkout."""

from agent.commands.probe_memory import main

if __name__ == "__main__":
    main()
