"""The command line: ``zipvl run``, ``zipvl inspect``, ``zipvl bench`` and ``zipvl doctor``."""
