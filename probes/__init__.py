"""Probes: trained or direct readouts of activations (question 3: is it still inside?)."""
