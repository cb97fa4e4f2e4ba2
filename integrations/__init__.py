"""IFR in other people's models: conv towers found and replaced, torchvision's detectors refined.

Nothing is imported here, so that one framework's absence is never another's trouble.
"""
