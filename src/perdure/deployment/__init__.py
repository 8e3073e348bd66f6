"""Deployments of a config with Flower: a SuperLink at the server, a SuperNode at each site.

`new_app` writes a Flower app that trains the config of a run, with scripts for the server and the
sites; `perdure app new` calls it. `server_app_of` and `client_app_of` build the two apps.
`make_certificates` and `make_node_key` make the files of TLS and of the sites' identities,
`superlink_command` and `supernode_command` the commands to start, and `check_superlink` tries a
connection before a SuperNode is started.
"""

from perdure.deployment.apps import client_app_of, server_app_of
from perdure.deployment.commands import (
    flower_settings,
    start,
    superlink_command,
    supernode_command,
)
from perdure.deployment.keys import make_certificates, make_node_key
from perdure.deployment.site_checks import check_site, check_superlink
from perdure.deployment.template import new_app

__all__ = [
    "check_site",
    "check_superlink",
    "client_app_of",
    "flower_settings",
    "make_certificates",
    "make_node_key",
    "new_app",
    "server_app_of",
    "start",
    "superlink_command",
    "supernode_command",
]
