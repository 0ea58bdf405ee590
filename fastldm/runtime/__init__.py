"""The engine: a model on a device (`engine`), and the static buffers and the loop of one shape (`plan`)."""
