"""What runs at the coordinator. Imports no torch, open_clip, opacus or tenseal: it holds no key."""

if not __name__.startswith("secure_fed."):  # else every module of the folder would exist twice, under two names
    raise ImportError(f"{__name__}: import it as secure_fed.{__name__}")
