"""What runs at a hospital: data, features, training, and one round at a site."""

if not __name__.startswith("secure_fed."):  # else every module of the folder would exist twice, under two names
    raise ImportError(f"{__name__}: import it as secure_fed.{__name__}")
