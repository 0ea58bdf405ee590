"""The models, written once on the contract of `fastldm.ops`. Module paths follow the hub's tensor names."""
