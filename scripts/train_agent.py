"""The command `train-agent`, run from a checkout."""

from agent.commands.train_agent import main

if __name__ == "__main__":
    main()
