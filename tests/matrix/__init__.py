"""Faults at every step of a handover, on real processes: steps x faults x hosts, and what becomes of the sessions."""
