"""Fleet rollouts: a release goes to many devices, group by group, over MQTT only.

Layers: `plan` and `progress` decide and are pure; `desired` is the wire's documents; `fleet`
is the broker's side; `store` is the file; `conductor` brings them together.
"""
