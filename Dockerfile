# Untested: written from the steps of the Makefile, never built.
FROM python:3.11-slim

# g++: Inductor and the CPU kernels compile C++ when a model is compiled.
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /adaattn

# Before the sources: this layer is large and changes seldom.
COPY requirements requirements
RUN pip install --no-cache-dir -r requirements/cpu.txt

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

CMD ["python", "examples/demo.py"]
