"""What runs at a hospital: data, features, training, and one round at a site."""
