"""Where images come from, a module per kind of source; `open.py` is the door."""
