"""What runs at the coordinator. Imports no torch, open_clip, opacus or tenseal: it holds no key."""
