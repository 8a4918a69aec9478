"""Studies of superposition in toy models, one file each; `overview` gathers what they found on one page."""
