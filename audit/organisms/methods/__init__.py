"""Unlearning methods, one file each: the loss, its source and its traps. Each module holds `METHOD`."""
