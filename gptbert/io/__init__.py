"""Files and the screen, independent of text and models.

- `files`: atomic writes of files and folders.
- `owner`: one writer for a folder or file: locks and leases.
- `environment`: environment variables, checked.
- `names`: of the files of runs and saved models.
- `outputs`: a command's outputs, checked before its work and published after it.
- `formats`: what a file is that lies where another one is expected.
- `json_file`: reading untrusted JSON, writing our own.
- `torch_file`: reading untrusted `torch.save` files without running code.
- `field_types`: fields of settings, as the command line gives them.
- `run_file`: a command's flags in a YAML or TOML file.
- `imports`: a command's imports, without garbage collections.
- `screen`: lines above the progress bar, and tables.
- `standard_output`: what a command prints: a full disk, and characters that an encoding lacks.
"""
