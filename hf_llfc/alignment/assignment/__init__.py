"""Linear assignment, exact or with a certified gap."""
