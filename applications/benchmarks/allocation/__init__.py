"""What the allocation of draws saves: a program, see ``__main__``."""
