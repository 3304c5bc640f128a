"""Views of an entry for people and for programs. Imports no torch, and runs nothing of what it reads."""
