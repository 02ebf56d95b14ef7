"""What goes wrong in practice at a site or a server: looked for one by one, each with how to mend it.

Nothing is changed and nothing is sent but a greeting to the study's server: ``/health``, and one call that says whether
it knows the site's key. What is found may name files and labels of the site: it is for the terminal, not for a log.
"""

from secure_fed.operate.doctor.finding import Finding
from secure_fed.operate.doctor.server import examine_server
from secure_fed.operate.doctor.site import examine_site

__all__ = ["Finding", "examine_server", "examine_site"]
