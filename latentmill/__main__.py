"""`python -m latentmill VERB ...`, the same as the command `latentmill`."""

from pipeline.__main__ import entry

if __name__ == "__main__":
    entry()
