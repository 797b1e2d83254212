"""The command line: the only room that builds engines from a config. Commands are imported when they are called."""
