"""From files to packed weights: what is on disk (`files`), under which names (`keymap`), into the model (`load`)."""
