"""An HTTP server with OpenAI's interface, over `LLM.generate_async`.

service.py      requests on an engine, with admission, metrics and audit; knows no HTTP
app.py          the application: routes, middleware, error bodies
server.py       sockets, signals, drain
"""
