// What `quick-c++` compiles in place of DeepSpeed's all-reduce in shared memory: of torch's headers none, so in a moment.
// At vector level 0 DeepSpeed calls torch's own all-reduce.
#include <Python.h>

static PyObject* initialize(PyObject*, PyObject*) { Py_RETURN_NONE; }

static PyObject* vector_kernel_level(PyObject*, PyObject*) { return PyLong_FromLong(0); }

static PyMethodDef functions[] = {
    {"initialize", initialize, METH_VARARGS, "Of the number of ranks and one's own: nothing to do."},
    {"vector_kernel_level", vector_kernel_level, METH_NOARGS, "No kernels."},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "no_shm", nullptr, -1, functions};

#define NAMED(name) PyInit_##name
#define INIT(name) NAMED(name)

PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
