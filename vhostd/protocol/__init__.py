"""The vhost-user back-end protocol. The daemon starts at `server.ExportServer`."""
