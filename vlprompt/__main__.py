"""``python -m vlprompt`` is the command ``vlprompt``."""

from vlprompt.cli.app import main

if __name__ == "__main__":
    main()
