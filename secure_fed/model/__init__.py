"""The frozen CLIP, the adapters on it, and what is measured of them. It knows no site and no key."""
