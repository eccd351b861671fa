"""Files and the screen: everything that knows neither text nor models.

- `files`: files and folders that are complete or absent.
- `outputs`: what a command writes, refused before the work and published after it.
- `json_file`: JSON, from elsewhere and our own.
- `torch_file`: `torch.save` files from elsewhere, read without running what they say.
- `screen`: lines above the progress bar, and tables.
"""
