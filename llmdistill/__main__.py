"""`python -m llmdistill`, the form that torchrun starts."""

from llmdistill.cli import main

if __name__ == "__main__":
    main()
