"""The commands of ``evercell``, one function each; `evercell.cli` puts them together.

A command parses, calls the Python function of the same name and prints; whatever is heavy is imported inside it.
"""
