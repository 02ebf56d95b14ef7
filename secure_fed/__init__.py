"""The core of secfacmic: what sites and server have in common, and the commands on top."""
