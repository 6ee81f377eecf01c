"""The sub-commands, a file each: the first line of its docstring is its help, ``main(argv)`` runs it."""
