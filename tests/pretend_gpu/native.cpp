// What torch's autograd asks CUDA's libraries, answered without a GPU. To be preloaded, so that it is found first.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::cuda {
DeviceIndex device_count() noexcept { return 8; }
DeviceIndex device_count_ensure_non_zero() { return 8; }
bool hasPrimaryContext(DeviceIndex) { return false; }
}

// Of the driver (the library calls itself libcuda.so.1): no device has a stream that is to be waited for.
extern "C" int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = *active = 0;
  return 0;
}

namespace {
using namespace c10;

struct Guard : impl::DeviceGuardImplInterface {
  static thread_local DeviceIndex current;
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  Stream getStream(Device device) const override {
    DeviceIndex index = device.index() < 0 ? current : device.index();
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, index));
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return 8; }
};
thread_local DeviceIndex Guard::current = 0;
}

extern "C" void pretend() { impl::registerDeviceGuard(DeviceType::CUDA, new Guard); }
