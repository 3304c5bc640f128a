// Calls the libraries that AOTInductor makes, without the GIL, from as many threads as come.
//
// torch's own runner holds the GIL while a piece runs, and lets one call at a time into a model instance. This does
// the same through the library's C interface. It includes no header: a machine that has a compiler need not have
// Python's headers, and torch's take ten seconds. What it calls is in Python's stable ABI, in torch's C shim, and in
// one C++ function that wraps a tensor. Tried with torch 2.11 and 2.13.

#include <dlfcn.h>
#include <time.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

struct PyObject;
struct PyThreadState;
using PyCFunction = PyObject* (*)(PyObject*, PyObject*);
struct PyMethodDef {
  const char* name;
  PyCFunction function;
  int flags;
  const char* doc;
};

extern "C" {
extern PyObject* PyExc_RuntimeError;
extern PyObject* PyExc_TypeError;
void PyErr_SetString(PyObject*, const char*);
PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject*, PyObject*);
PyObject* PyCapsule_New(void*, const char*, void (*)(PyObject*));
void* PyCapsule_GetPointer(PyObject*, const char*);
ptrdiff_t PyList_Size(PyObject*);
PyObject* PyList_GetItem(PyObject*, ptrdiff_t);
PyObject* PyList_New(ptrdiff_t);
int PyList_SetItem(PyObject*, ptrdiff_t, PyObject*);
int PyList_SetSlice(PyObject*, ptrdiff_t, ptrdiff_t, PyObject*);
int PyObject_IsInstance(PyObject*, PyObject*);
void Py_DecRef(PyObject*);
PyThreadState* PyEval_SaveThread();
void PyEval_RestoreThread(PyThreadState*);
int aoti_torch_new_tensor_handle(void*, void**);
int aoti_torch_delete_tensor_object(void*);
extern PyObject* THPVariableClass;
}

namespace at {
class TensorBase;
}
PyObject* THPVariable_Wrap(const at::TensorBase&);

namespace {

using Container = void*;

constexpr int kMethO = 8;
constexpr ptrdiff_t kUsual = 64;
constexpr const char* kName = "stitchcache.piece";
// Whoever lets go of the GIL may wait 5 ms for it where other threads run Python: a piece that was short keeps it.
constexpr int64_t kShort = 20'000;

struct Piece {
  void* library = nullptr;
  std::string device;
  int32_t index = -1;
  size_t offset = 0;
  size_t outputs = 0;
  int (*create)(Container*, size_t, const char*, const char*) = nullptr;
  int (*destroy)(Container) = nullptr;
  int (*run)(Container, void**, size_t, void**, size_t, void*, void*) = nullptr;
  int (*count)(Container, size_t*) = nullptr;
  int (*last_error)(const char**) = nullptr;
  int (*stream)(int32_t, void**) = nullptr;
  std::atomic<int64_t> nanoseconds{kShort};
  std::mutex lock;
  std::vector<Container> idle;  // model instances that no call uses; there are as many as there were calls at once

  ~Piece() {
    for (Container container : idle) destroy(container);
    if (library) dlclose(library);
  }
};

PyObject* fail(const Piece& piece, const std::string& what) {
  const char* why = nullptr;
  if (piece.last_error) piece.last_error(&why);
  PyErr_SetString(PyExc_RuntimeError, (why && *why ? what + ": " + why : what).c_str());
  return nullptr;
}

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

int run(Piece& piece, void** inputs, size_t count, void** outputs) {
  Container container = nullptr;
  {
    std::lock_guard<std::mutex> held(piece.lock);
    if (!piece.idle.empty()) {
      container = piece.idle.back();
      piece.idle.pop_back();
    }
  }
  if (!container && piece.create(&container, 1, piece.device.c_str(), nullptr)) {
    for (size_t i = 0; i < count; ++i) aoti_torch_delete_tensor_object(inputs[i]);
    return 1;
  }
  void* stream = nullptr;
  if (piece.stream) piece.stream(piece.index, &stream);
  // Takes the inputs over, also where it fails.
  int status = piece.run(container, inputs, count, outputs, piece.outputs, stream, nullptr);
  std::lock_guard<std::mutex> held(piece.lock);
  piece.idle.push_back(container);
  return status;
}

PyObject* call(PyObject* self, PyObject* inputs) {
  auto& piece = *static_cast<Piece*>(PyCapsule_GetPointer(self, kName));
  const ptrdiff_t count = PyList_Size(inputs);
  if (count < 0) return nullptr;
  void* usual[kUsual];
  std::vector<void*> many;
  void** handles = usual;
  if (count + static_cast<ptrdiff_t>(piece.outputs) > kUsual) {
    many.resize(count + piece.outputs);
    handles = many.data();
  }
  for (ptrdiff_t i = 0; i < count; ++i) {
    PyObject* tensor = PyList_GetItem(inputs, i);
    const int is_tensor = PyObject_IsInstance(tensor, THPVariableClass);
    char* inside = reinterpret_cast<char*>(tensor) + piece.offset;
    if (is_tensor != 1 || aoti_torch_new_tensor_handle(inside, &handles[i])) {
      while (i--) aoti_torch_delete_tensor_object(handles[i]);
      if (is_tensor == 0) PyErr_SetString(PyExc_TypeError, "a piece takes tensors only");
      return is_tensor == 1 ? fail(piece, "an input cannot be given to a piece") : nullptr;
    }
  }
  // The handles are owners too: emptied, the list keeps nothing alive that the piece is done with.
  PyList_SetSlice(inputs, 0, count, nullptr);
  void** results = handles + count;
  const int64_t began = now();
  int status;
  if (piece.nanoseconds.load(std::memory_order_relaxed) < kShort) {
    status = run(piece, handles, count, results);
    piece.nanoseconds.store(now() - began, std::memory_order_relaxed);
  } else {
    PyThreadState* state = PyEval_SaveThread();
    status = run(piece, handles, count, results);
    // Before the GIL is waited for.
    piece.nanoseconds.store(now() - began, std::memory_order_relaxed);
    PyEval_RestoreThread(state);
  }
  if (status) return fail(piece, "a piece failed");
  PyObject* list = PyList_New(piece.outputs);
  for (size_t i = 0; i < piece.outputs; ++i) {
    PyObject* tensor = list ? THPVariable_Wrap(*static_cast<const at::TensorBase*>(results[i])) : nullptr;
    aoti_torch_delete_tensor_object(results[i]);
    if (tensor) {
      PyList_SetItem(list, i, tensor);
    } else if (list) {
      Py_DecRef(list);
      list = nullptr;
    }
  }
  return list;
}

void finish(PyObject* capsule) { delete static_cast<Piece*>(PyCapsule_GetPointer(capsule, kName)); }

PyMethodDef method = {"piece", call, kMethO, "Run a compiled piece: a list of tensors to a list of tensors."};

template <typename Function>
bool find(const Piece& piece, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(piece.library, name));
  return function != nullptr;
}

}  // namespace

// Maps a library and makes one model instance. `index` is a GPU's, or -1; `offset` is where a Python tensor keeps its
// at::Tensor. Called with the GIL.
extern "C" __attribute__((visibility("default"))) PyObject* stitchcache_load(
    const char* path, const char* device, int32_t index, size_t offset) {
  auto* piece = new Piece;
  piece->device = device;
  piece->index = index;
  piece->offset = offset;
  piece->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  Container container = nullptr;
  if (!piece->library) {
    PyErr_SetString(PyExc_RuntimeError, dlerror());
  } else if (
      !find(*piece, "AOTInductorModelContainerCreateWithDevice", piece->create) ||
      !find(*piece, "AOTInductorModelContainerDelete", piece->destroy) ||
      !find(*piece, "AOTInductorModelContainerRunSingleThreaded", piece->run) ||
      !find(*piece, "AOTInductorModelContainerGetNumOutputs", piece->count) ||
      (index >= 0 && !find(*piece, "aoti_torch_get_current_cuda_stream", piece->stream))) {
    fail(*piece, "this is no library of AOTInductor's, or of another torch");
  } else {
    find(*piece, "AOTInductorGetLastError", piece->last_error);
    if (!piece->create(&container, 1, device, nullptr) && !piece->count(container, &piece->outputs)) {
      piece->idle.push_back(container);
      PyObject* capsule = PyCapsule_New(piece, kName, finish);
      PyObject* function = capsule ? PyCFunction_NewEx(&method, capsule, nullptr) : nullptr;
      if (capsule) Py_DecRef(capsule);
      return function;
    }
    fail(*piece, "a model instance cannot be made");
  }
  delete piece;
  return nullptr;
}
