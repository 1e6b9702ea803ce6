"""Run the MQTT broker that comes with pip (`iotcore`, which is rumqttd) in this process.

Owns nothing but the process: what the broker listens on and what it accepts stands in the
file that `console.embedded` writes. `iotcore.Broker` is not used, because it starts a
child of its own and so hides the broker's end from the supervisor.

Imports nothing of Edgeward, so that it can be run by its path, whatever the working
directory holds: `python -I embedded_mqtt.py --config FILE`
"""

import argparse
import logging
import signal
import sys


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal ends the process; blocks."""
    parser = argparse.ArgumentParser(prog="edgeward embedded MQTT broker")
    parser.add_argument("--config", required=True, help="rumqttd settings, TOML")
    config_path = parser.parse_args(argv).config
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    # rumqttd opens its routing spans at level ERROR, which would log a line for every packet.
    logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
    # The broker blocks outside Python, where a Python handler would never get its turn.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from iotcore.iotcore import IotCoreBroker

    IotCoreBroker(config_path=config_path).run_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
