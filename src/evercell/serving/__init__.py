"""The web page and its HTTP interface: `evercell serve`.

::

    settings     what a server is asked for
    guard        who may ask what: host, origin, token; uploads with limits
    corrections  labels that users changed
    jobs         the queue, and the processes that do the work
    work         what these processes do; the only module here that imports torch
    app          routes
    page/        HTML, CSS and JavaScript, as they are sent
"""
