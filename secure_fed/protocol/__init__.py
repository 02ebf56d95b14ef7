"""What sites and server say to each other: the study, signed frames, envelopes, records. Neither torch nor Flower."""
