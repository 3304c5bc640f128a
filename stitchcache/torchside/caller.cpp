// Calls the libraries that AOTInductor makes, without the GIL, from as many threads as come.
//
// torch's own runner holds the GIL while a piece runs, and lets one call at a time into a model instance. This does
// the same through the library's C interface. It includes headers of C only: a machine that has a compiler need not
// have Python's, torch's take ten seconds and C++'s one. What it calls is in Python's stable ABI, in torch's C shim,
// and one C++ function that wraps a tensor. Tried with torch 2.11 and 2.13.

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

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
int omp_get_max_threads() __attribute__((weak));  // torch's OpenMP
extern PyObject* THPVariableClass;
}

namespace at {
class TensorBase;
}
PyObject* THPVariable_Wrap(const at::TensorBase&);

namespace {

using Container = void*;

constexpr int kMethO = 8;
constexpr size_t kUsual = 64;
constexpr const char* kName = "stitchcache.piece";
// Whoever lets go of the GIL may wait 5 ms for it where other threads run Python: a piece that was short keeps it.
constexpr int64_t kShort = 20'000;
// A piece that runs this long, in nanoseconds, is worth two system calls.
constexpr int64_t kLong = 500'000;
constexpr uint64_t kSlice = 100'000'000;

struct Piece {
  void* library;
  char device[16];
  int32_t index;
  size_t offset;
  size_t outputs;
  int (*create)(Container*, size_t, const char*, const char*);
  int (*destroy)(Container);
  int (*run)(Container, void**, size_t, void**, size_t, void*, void*);
  int (*count)(Container, size_t*);
  int (*last_error)(const char**);
  int (*stream)(int32_t, void**);
  int64_t nanoseconds;  // of the last run
  pthread_mutex_t lock;
  // Model instances that no call uses. There are as many as there were calls at once.
  Container* idle;
  size_t count_idle, room;
};

PyObject* fail(const Piece& piece, const char* what) {
  const char* why = nullptr;
  char text[1024];
  if (piece.last_error) piece.last_error(&why);
  snprintf(text, sizeof text, "%s%s%s", what, why && *why ? ": " : "", why ? why : "");
  PyErr_SetString(PyExc_RuntimeError, text);
  return nullptr;
}

void discard(Piece* piece) {
  while (piece->count_idle) piece->destroy(piece->idle[--piece->count_idle]);
  if (piece->library) dlclose(piece->library);
  pthread_mutex_destroy(&piece->lock);
  free(piece->idle);
  free(piece);
}

void put_back(Piece& piece, Container container) {
  pthread_mutex_lock(&piece.lock);
  if (piece.count_idle == piece.room) {
    const size_t room = piece.room ? 2 * piece.room : 4;
    auto* larger = static_cast<Container*>(realloc(piece.idle, room * sizeof(Container)));
    if (larger) {
      piece.idle = larger;
      piece.room = room;
    }
  }
  const bool kept = piece.count_idle < piece.room;
  if (kept) piece.idle[piece.count_idle++] = container;
  pthread_mutex_unlock(&piece.lock);
  if (!kept) piece.destroy(container);
}

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

int run(Piece& piece, void** inputs, size_t count, void** outputs) {
  pthread_mutex_lock(&piece.lock);
  Container container = piece.count_idle ? piece.idle[--piece.count_idle] : nullptr;
  pthread_mutex_unlock(&piece.lock);
  if (!container && piece.create(&container, 1, piece.device, nullptr)) {
    for (size_t i = 0; i < count; ++i) aoti_torch_delete_tensor_object(inputs[i]);
    return 1;
  }
  void* stream = nullptr;
  if (piece.stream) piece.stream(piece.index, &stream);
  // Takes the inputs over, also where it fails.
  const int status = piece.run(container, inputs, count, outputs, piece.outputs, stream, nullptr);
  put_back(piece, container);
  return status;
}

// Handles of the inputs, which own what they stand for; false where an error is set.
bool take_inputs(const Piece& piece, PyObject* inputs, ptrdiff_t count, void** handles) {
  for (ptrdiff_t i = 0; i < count; ++i) {
    PyObject* tensor = PyList_GetItem(inputs, i);
    const int is_tensor = PyObject_IsInstance(tensor, THPVariableClass);
    char* inside = reinterpret_cast<char*>(tensor) + piece.offset;
    if (is_tensor == 1 && !aoti_torch_new_tensor_handle(inside, &handles[i])) continue;
    while (i--) aoti_torch_delete_tensor_object(handles[i]);
    if (is_tensor == 0) PyErr_SetString(PyExc_TypeError, "a piece takes tensors only");
    if (is_tensor == 1) fail(piece, "an input cannot be given to a piece");
    return false;
  }
  return true;
}

PyObject* give_outputs(const Piece& piece, void** results) {
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

// While it lives, the thread's turns on a core are long ones. From Linux 6.12 on, threads with shorter turns that wake
// beside it go first, where they would wait for the end of its turn, or for the next tick of the clock. The thread's
// share of the cores is the same. Older kernels ignore it; threads with a policy of their own keep theirs.
class LongTurns {
 public:
  LongTurns() {
    // A filter of system calls may end a process for one that it does not like. A call on several cores may start
    // threads, which would keep what they inherit.
    if (prctl(PR_GET_SECCOMP) || !omp_get_max_threads || omp_get_max_threads() != 1) return;
    changed_ = read(own_) && set(own_, kSlice);
  }
  ~LongTurns() {
    Attributes now = {};
    // What somebody else has changed meanwhile stays.
    if (changed_ && read(now) && now.slice == kSlice) set(now, own_.slice);
  }

 private:
  struct Attributes {  // sched_attr of linux/sched/types.h, which not every machine has
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t slice, deadline, period;
  };
  static bool read(Attributes& into) {
    return !syscall(SYS_sched_getattr, 0, &into, sizeof into, 0) && into.policy == SCHED_OTHER;
  }
  static bool set(Attributes wanted, uint64_t slice) {
    wanted.size = sizeof wanted;
    wanted.slice = slice;
    return !syscall(SYS_sched_setattr, 0, &wanted, 0);
  }
  Attributes own_ = {};
  bool changed_ = false;
};

int run_aside(Piece& piece, void** inputs, size_t count, void** outputs, bool is_long) {
  // The first run in a thread may start others.
  thread_local bool ran = false;
  const bool again = ran;
  ran = true;
  if (!again || !is_long) return run(piece, inputs, count, outputs);
  const LongTurns turns;
  return run(piece, inputs, count, outputs);
}

PyObject* call_on(Piece& piece, PyObject* inputs, ptrdiff_t count, void** handles) {
  if (!take_inputs(piece, inputs, count, handles)) return nullptr;
  // The handles are owners too: emptied, the list keeps nothing alive that the piece is done with.
  PyList_SetSlice(inputs, 0, count, nullptr);
  const int64_t last = __atomic_load_n(&piece.nanoseconds, __ATOMIC_RELAXED);
  const bool keeps = last < kShort;
  const int64_t began = now();
  PyThreadState* state = keeps ? nullptr : PyEval_SaveThread();
  const int status = run_aside(piece, handles, count, handles + count, last > kLong);
  // Before the GIL is waited for.
  __atomic_store_n(&piece.nanoseconds, now() - began, __ATOMIC_RELAXED);
  if (state) PyEval_RestoreThread(state);
  return status ? fail(piece, "a piece failed") : give_outputs(piece, handles + count);
}

PyObject* call(PyObject* self, PyObject* inputs) {
  auto& piece = *static_cast<Piece*>(PyCapsule_GetPointer(self, kName));
  const ptrdiff_t count = PyList_Size(inputs);
  if (count < 0) return nullptr;
  void* usual[kUsual];
  const size_t total = count + piece.outputs;
  void** handles = total <= kUsual ? usual : static_cast<void**>(malloc(total * sizeof(void*)));
  PyObject* results = handles ? call_on(piece, inputs, count, handles) : fail(piece, "out of memory");
  if (handles != usual) free(handles);
  return results;
}

void finish(PyObject* capsule) { discard(static_cast<Piece*>(PyCapsule_GetPointer(capsule, kName))); }

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
  auto* piece = static_cast<Piece*>(calloc(1, sizeof(Piece)));
  if (!piece) abort();
  pthread_mutex_init(&piece->lock, nullptr);
  snprintf(piece->device, sizeof piece->device, "%s", device);
  piece->index = index;
  piece->offset = offset;
  piece->nanoseconds = kShort;
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
      put_back(*piece, container);
      PyObject* capsule = PyCapsule_New(piece, kName, finish);
      PyObject* function = capsule ? PyCFunction_NewEx(&method, capsule, nullptr) : nullptr;
      if (capsule) Py_DecRef(capsule);
      return function;
    }
    fail(*piece, "a model instance cannot be made");
  }
  discard(piece);
  return nullptr;
}
