"""What each reducer saves and what it costs: a program, see ``__main__``."""
