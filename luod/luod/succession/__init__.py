"""How the set of preserved sessions reaches the other side of a replacement. Today: to a successor process."""
