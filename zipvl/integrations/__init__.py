"""Where zipvl plugs into other libraries; one file a library."""
