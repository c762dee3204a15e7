"""The command line: ``zipvl run``, ``zipvl inspect`` and ``zipvl doctor``."""
