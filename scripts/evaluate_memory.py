"""The command `evaluate-memory`, run from a checkout."""

from agent.commands.evaluate_memory import main

if __name__ == "__main__":
    main()
