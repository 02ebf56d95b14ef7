"""What both ends share of Flower's messages and of TLS."""
