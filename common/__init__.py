"""Knowledge transfer between peers: the method and its machinery, without a host or a task."""
