"""What the mesh costs on this machine: a request, a parked job, a change of workers."""
