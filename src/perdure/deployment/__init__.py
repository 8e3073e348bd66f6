"""Deployments of a config with Flower: a SuperLink at the server, a SuperNode at each site.

`new_app` writes a Flower app that trains the config of a run, with scripts for the server and the
sites; `perdure app new` calls it. `server_app_of` and `client_app_of` build the two apps.
`make_certificates` and `make_node_key` make the files of TLS and of the sites' identities,
`superlink_command` and `supernode_command` the commands to start, and `check_superlink` tries a
connection before a SuperNode is started. The other functions check what the scripts of an app are
given, so that a mistake ends in one line.
"""

from perdure.deployment.apps import client_app_of, server_app_of
from perdure.deployment.commands import (
    check_port,
    flower_settings,
    one_line_errors,
    start,
    superlink_command,
    supernode_command,
)
from perdure.deployment.keys import check_public_key, make_certificates, make_node_key
from perdure.deployment.run_settings import check_settings
from perdure.deployment.site_checks import check_site, check_superlink
from perdure.deployment.template import new_app

__all__ = [
    "check_port",
    "check_public_key",
    "check_settings",
    "check_site",
    "check_superlink",
    "client_app_of",
    "flower_settings",
    "make_certificates",
    "make_node_key",
    "new_app",
    "one_line_errors",
    "server_app_of",
    "start",
    "superlink_command",
    "supernode_command",
]
