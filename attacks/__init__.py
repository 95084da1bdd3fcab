"""Attacks: changes that bring knowledge back (question 4: does it come back?)."""
