"""Programs that use `jattn`; `README.md` in this folder says what each one shows."""
