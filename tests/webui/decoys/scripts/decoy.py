"""Another extension, which imports its own modules by names that are not only its own."""

import controls
import core
import hosts
import live
import profiles
import sampling
import session

import extension
import js
import nodes

ALL = controls, core, extension, hosts, js, live, nodes, profiles, sampling, session
print("decoy:", all(getattr(module, "DECOY", False) for module in ALL))
